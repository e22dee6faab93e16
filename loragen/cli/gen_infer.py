"""`loragen gen infer`: prompts -> adapters."""

from pathlib import Path
from typing import Annotated

import typer

from loragen.cli import render
from loragen.cli.options import Force, Json


def infer(
    model: Annotated[
        Path, typer.Option("--model", help="An experiment directory or its generator_model.pt.")
    ],
    output: Annotated[Path, typer.Option("--output", help="Where the PEFT adapter is written.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="A prompt of the dataset. Repeatable.")
    ] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option(
            "--prompt-file",
            help="Prompts: .txt (one a line), or rows or hub:owner/name as for lora train.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only the first so many prompts.")
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Turn a few unlabelled prompts of a dataset into a LoRA adapter, without training.

    The output is an ordinary PEFT directory: `peft.PeftModel.from_pretrained(base, DIR)`.
    """
    from loragen.core.data.documents import parsed_source
    from loragen.core.data.prompts import read_prompts
    from loragen.core.errors import UsageError
    from loragen.core.files import refuse_existing
    from loragen.core.runs import ADAPTER_CONFIG, generator_file

    file = generator_file(model)
    refuse_existing(output, force, marker=ADAPTER_CONFIG)
    read = read_prompts(parsed_source(prompt_file)) if prompt_file else []
    prompts = [*(prompt or ()), *read][:limit]
    if not any(text.strip() for text in prompts):
        raise UsageError("no prompts: give --prompt TEXT (repeatable) or --prompt-file FILE")

    from loragen.core.generator.infer import infer as generate
    from loragen.core.generator.model import Generator
    from loragen.core.quiet import quiet_libraries

    quiet_libraries()
    generator = Generator.load(file)
    result = generate(generator, prompts, output, overwrite=force)
    if json:
        render.answer_json(
            {
                "adapter": str(output),
                "base_model": generator.base_model,
                "values": result.values,
                "prompts": result.origin.prompts,
                "seconds": result.seconds,
            }
        )
    else:
        render.note(
            f"{result.values:,} values from {result.origin.prompts} prompts "
            f"in {result.seconds:.3f} s"
        )
        render.answer(str(output))
