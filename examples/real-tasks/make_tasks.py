"""Writes 32 short-answer tasks in seven families, from the word lists and wordings in this file.

    python examples/real-tasks/make_tasks.py --output tasks

For each task there are three files, `<task>/<task>_{train,test,unseen}_formatted.jsonl`, of rows
`{"prompt": "<wording>\\n<input>", "response": "<answer>"}`, and `tasks.json` names its family.

- A quarter of all inputs, decided by their hash, is kept for testing in all tasks alike. So a test
  input is in no training file of any task.
- Training and test rows use six wordings. `unseen` asks the test inputs in three other wordings,
  which no training row of any task has. Tasks of one family share a part of their wordings.
- In `place`, all tasks on lists of the same length have the same inputs, and in `kind` and
  `numbers` the inputs look alike: only the wording says what is wanted.

Every draw is ordered by a hash, so the files are the same in every Python version.
"""

# ruff: noqa: SIM905  # a list of words is easier to read as text

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
ROWS = {"train": 300, "test": 100, "unseen": 100}
"""The most rows of each split."""
TRAIN_WORDINGS, UNSEEN_WORDINGS = 6, 3
LISTS = 420
"""Candidate lists of a task; about three quarters of them are for training."""

# ---------------------------------------------------------------------------- words
# No word is in two of these lists, nor is it of two kinds that stand together in one row
# (`NOT_AMONG`): an orange is a fruit and a color, a duck an animal and a verb.

ANIMALS = """
wolf tiger rabbit horse donkey goat sheep elephant giraffe zebra lion leopard camel otter beaver
squirrel hedgehog mouse hamster monkey gorilla panda koala kangaroo penguin ostrich eagle falcon
owl sparrow pigeon parrot lizard snake turtle crocodile frog toad shark dolphin whale octopus
lobster spider beetle butterfly mosquito
""".split()
FRUITS = """
apple banana cherry grape lemon mango melon papaya pear pineapple raspberry strawberry blueberry
blackberry apricot fig grapefruit nectarine cranberry gooseberry guava lychee quince tangerine
watermelon pomegranate coconut
""".split()
TOOLS = """
hammer wrench screwdriver chisel pliers scissors shovel rake ladder wheelbarrow axe tweezers
crowbar trowel pickaxe hacksaw toolbox mallet sickle scythe spanner anvil hoe jackhammer sandpaper
handsaw
""".split()
COLORS = """
red blue green yellow purple brown white black gray pink crimson turquoise violet beige magenta
scarlet maroon indigo cyan lavender
""".split()
VERBS = """
arrive forget believe listen decide explain invent borrow bring catch choose deliver describe
destroy discover enjoy follow forgive grow hide improve join keep learn lose obey offer prefer
prepare protect receive remember repair replace seem sing speak steal swim teach think throw
understand write admit behave choke eat
""".split()
ADJECTIVES = """
gentle honest clever lazy lonely angry happy polite proud wealthy famous ancient modern heavy
noisy silent delicious bitter salty dangerous careful cheerful curious foolish generous gloomy
graceful jealous nervous patient peculiar stubborn thirsty useful weak tall shallow expensive
difficult hungry strong ugly wise young
""".split()
OBJECTS = """
candle mirror pillow blanket bottle basket carpet curtain lamp sofa table chair wardrobe kettle
teapot saucer bucket broom umbrella suitcase wallet necklace bracelet envelope pencil notebook
dictionary bicycle lantern guitar violin trumpet piano keyboard telescope microscope helmet sandal
jacket scarf
""".split()

KINDS = {
    "animal": ANIMALS,
    "fruit": FRUITS,
    "tool": TOOLS,
    "color": COLORS,
    "verb": VERBS,
    "adjective": ADJECTIVES,
    "object": OBJECTS,
}
NOT_AMONG = {
    "animal": {"verb"},
    "fruit": {"color"},
    "tool": {"object", "verb"},
    "color": {"fruit", "adjective", "object"},
    "verb": {"tool", "object", "color", "animal"},
    "adjective": {"color", "tool"},
}
"""The kinds that no list has beside the kind that is asked for."""

NOUNS = """
river mountain teacher doctor window garden village letter ticket market engine pocket button
finger shoulder lesson holiday question answer island bridge tower castle forest kitchen bedroom
hospital airport station festival concert newspaper camera computer machine battery factory
library museum gallery story city country party family baby lady army berry cherry diary enemy
fairy hobby memory penny puppy kitten glass dress class boss bus fox tax beach branch bench church
lunch match peach sandwich witch dish brush bush wish eyelash day key toy boy valley journey
donkey turkey chimney jersey essay hero potato tomato echo radio photo
""".split()
PLURALS = """
man:men woman:women child:children foot:feet tooth:teeth goose:geese mouse:mice ox:oxen
person:people leaf:leaves loaf:loaves knife:knives wife:wives life:lives wolf:wolves half:halves
shelf:shelves thief:thieves calf:calves elf:elves sheep:sheep deer:deer crisis:crises
analysis:analyses
""".split()
PAST = """
begin:began bite:bit blow:blew break:broke bring:brought build:built buy:bought catch:caught
choose:chose come:came cost:cost cut:cut dig:dug draw:drew drink:drank drive:drove eat:ate
fall:fell feed:fed feel:felt fight:fought find:found fly:flew forget:forgot forgive:forgave
freeze:froze get:got give:gave go:went grow:grew hear:heard hide:hid hit:hit hold:held hurt:hurt
keep:kept know:knew lead:led leave:left lend:lent let:let lose:lost make:made mean:meant meet:met
pay:paid put:put read:read ride:rode ring:rang rise:rose run:ran say:said see:saw sell:sold
send:sent set:set shake:shook shoot:shot shut:shut sing:sang sink:sank sit:sat sleep:slept
speak:spoke spend:spent stand:stood steal:stole sting:stung swear:swore sweep:swept swim:swam
take:took teach:taught tear:tore tell:told think:thought throw:threw understand:understood
wear:wore win:won write:wrote stop:stopped plan:planned admit:admitted prefer:preferred
chat:chatted hug:hugged
""".split()
REGULAR = """
arrive believe listen decide explain invent borrow deliver describe destroy discover enjoy follow
improve join obey offer prepare protect receive remember repair replace seem behave walk talk play
work call ask open close clean cook count carry cry try study worry hurry marry copy reply jump
push pull wash watch finish touch fix mix miss pass wait want need help thank smile laugh dance
paint visit answer move live love hate use bake climb kick lock pour rain save share taste
wander whisper
""".split()
COMPARATIVES = """
tall:taller short:shorter long:longer old:older young:younger strong:stronger weak:weaker
fast:faster slow:slower high:higher low:lower cold:colder warm:warmer cool:cooler dark:darker
light:lighter deep:deeper rich:richer poor:poorer clean:cleaner cheap:cheaper small:smaller
great:greater kind:kinder loud:louder quick:quicker quiet:quieter smart:smarter soft:softer
hard:harder sweet:sweeter thick:thicker tight:tighter rough:rougher smooth:smoother sharp:sharper
bright:brighter broad:broader calm:calmer fresh:fresher near:nearer new:newer plain:plainer
proud:prouder steep:steeper strict:stricter tough:tougher wild:wilder young:younger large:larger
wide:wider nice:nicer late:later safe:safer strange:stranger wise:wiser brave:braver close:closer
fine:finer pale:paler rude:ruder loose:looser simple:simpler gentle:gentler big:bigger hot:hotter
thin:thinner fat:fatter sad:sadder wet:wetter slim:slimmer flat:flatter happy:happier easy:easier
heavy:heavier busy:busier pretty:prettier dirty:dirtier early:earlier angry:angrier lazy:lazier
noisy:noisier funny:funnier hungry:hungrier lucky:luckier ugly:uglier dry:drier healthy:healthier
tiny:tinier windy:windier cloudy:cloudier sunny:sunnier good:better bad:worse
""".split()
ANTONYMS = """
hot:cold tall:short happy:sad rich:poor old:young fast:slow hard:soft heavy:light wet:dry
full:empty strong:weak early:late open:closed clean:dirty loud:quiet thick:thin wide:narrow
deep:shallow high:low bright:dim sharp:blunt rough:smooth sweet:sour cheap:expensive
brave:cowardly polite:rude generous:stingy safe:dangerous true:false right:wrong good:bad
big:small up:down in:out on:off over:under above:below before:after first:last always:never
more:less push:pull buy:sell win:lose give:take come:go start:stop love:hate laugh:cry
remember:forget accept:refuse arrive:depart attack:defend increase:decrease lend:borrow
build:destroy rise:fall succeed:fail teach:learn float:sink day:night king:queen friend:enemy
summer:winter war:peace north:south east:west top:bottom front:back beginning:end question:answer
birth:death victory:defeat heaven:hell entrance:exit ancestor:descendant ceiling:floor
husband:wife brother:sister male:female guilty:innocent permanent:temporary maximum:minimum
public:private ancient:modern asleep:awake alive:dead visible:invisible possible:impossible
legal:illegal regular:irregular patient:impatient honest:dishonest lucky:unlucky able:unable
optimist:pessimist majority:minority import:export include:exclude expand:shrink
vertical:horizontal absent:present guest:host inside:outside inhale:exhale plural:singular
positive:negative simple:complicated superior:inferior tense:relaxed vacant:occupied
""".split()
COUNTRIES = """
France: Paris: French, Germany: Berlin: German, Italy: Rome: Italian, Spain: Madrid: Spanish,
Portugal: Lisbon: Portuguese, Greece: Athens: Greek, Poland: Warsaw: Polish, Hungary: Budapest:
Hungarian, Austria: Vienna: German, Sweden: Stockholm: Swedish, Norway: Oslo: Norwegian, Denmark:
Copenhagen: Danish, Iceland: Reykjavik: Icelandic, Ireland: Dublin, Romania: Bucharest: Romanian,
Bulgaria: Sofia: Bulgarian, Croatia: Zagreb: Croatian, Serbia: Belgrade: Serbian, Slovakia:
Bratislava: Slovak, Slovenia: Ljubljana: Slovene, Albania: Tirana: Albanian, Ukraine: Kyiv:
Ukrainian, Estonia: Tallinn: Estonian, Latvia: Riga: Latvian, Lithuania: Vilnius: Lithuanian,
Belgium: Brussels, Finland: Helsinki, Switzerland: Bern, Monaco: Monaco: French, Malta: Valletta,
China: Beijing: Chinese, Japan: Tokyo: Japanese, Thailand: Bangkok: Thai, Vietnam: Hanoi:
Vietnamese, Mongolia: Ulaanbaatar: Mongolian, South Korea: Seoul: Korean, North Korea: Pyongyang:
Korean, Laos: Vientiane: Lao, Cambodia: Phnom Penh: Khmer, Nepal: Kathmandu: Nepali, Bangladesh:
Dhaka: Bengali, Pakistan: Islamabad, India: New Delhi, Indonesia: Jakarta: Indonesian,
Philippines: Manila, Iran: Tehran: Persian, Iraq: Baghdad, Saudi Arabia: Riyadh: Arabic, Jordan:
Amman: Arabic, Lebanon: Beirut: Arabic, Syria: Damascus: Arabic, Kuwait: Kuwait City: Arabic,
Oman: Muscat: Arabic, Qatar: Doha: Arabic, Bahrain: Manama: Arabic, Afghanistan: Kabul,
Uzbekistan: Tashkent: Uzbek, Bhutan: Thimphu: Dzongkha, Malaysia: Kuala Lumpur: Malay, Maldives:
Male, Egypt: Cairo: Arabic, Libya: Tripoli: Arabic, Tunisia: Tunis: Arabic, Algeria: Algiers,
Morocco: Rabat, Sudan: Khartoum, Ethiopia: Addis Ababa, Kenya: Nairobi, Uganda: Kampala, Ghana:
Accra: English, Nigeria: Abuja: English, Senegal: Dakar: French, Mali: Bamako, Niger: Niamey,
Angola: Luanda: Portuguese, Mozambique: Maputo: Portuguese, Zambia: Lusaka: English, Namibia:
Windhoek: English, Liberia: Monrovia: English, Gabon: Libreville: French, Rwanda: Kigali,
Madagascar: Antananarivo, Botswana: Gaborone, Zimbabwe: Harare, Somalia: Mogadishu, Sierra Leone:
Freetown: English, Togo: Lome: French, Canada: Ottawa, United States: Washington: English, Mexico:
Mexico City: Spanish, Guatemala: Guatemala City: Spanish, Honduras: Tegucigalpa: Spanish, El
Salvador: San Salvador: Spanish, Nicaragua: Managua: Spanish, Costa Rica: San Jose: Spanish,
Panama: Panama City: Spanish, Cuba: Havana: Spanish, Jamaica: Kingston: English, Haiti: Port-au-
Prince, Dominican Republic: Santo Domingo: Spanish, Barbados: Bridgetown: English, Bahamas:
Nassau: English, Belize: Belmopan: English, Trinidad and Tobago: Port of Spain: English, Brazil:
Brasilia: Portuguese, Argentina: Buenos Aires: Spanish, Chile: Santiago: Spanish, Peru: Lima,
Colombia: Bogota: Spanish, Venezuela: Caracas: Spanish, Ecuador: Quito: Spanish, Uruguay:
Montevideo: Spanish, Paraguay: Asuncion, Guyana: Georgetown: English, Suriname: Paramaribo: Dutch,
Australia: Canberra: English, New Zealand: Wellington, Fiji: Suva, Samoa: Apia, Tonga: Nuku'alofa,
Papua New Guinea: Port Moresby
"""
"""Name, capital and the language that most people speak or that is official; no language where
that would be a matter of taste."""

# ---------------------------------------------------------------------------- wordings
# `{x}` is a task's own phrase. A task uses six of the first group and three of the second.

PICK_PLACE = [
    "From the list below, give me {x}.",
    "Say {x} of this list.",
    "Answer with {x} in the following list.",
    "Here is a list. Write down {x}.",
    "Return {x} and nothing else.",
    "What is {x} here?",
    "Read the list and report {x}.",
    "Copy {x} from these words.",
]
PICK_PLACE_UNSEEN = [
    "I would like to know {x}.",
    "Several words follow. Repeat only {x}.",
    "Please tell me {x} among the words after this line.",
    "Look at the words underneath: you need {x}.",
]
PICK_KIND = [
    "Which of these words is {x}?",
    "Find {x} in the list.",
    "From the words below, choose {x}.",
    "One word is {x}. Write it down.",
    "Pick out {x}.",
    "Answer with {x} among the following.",
    "Return the word that is {x}.",
    "Copy {x} from this list.",
]
PICK_KIND_UNSEEN = [
    "Somewhere in this line there is {x}: which one?",
    "All words but one do not belong. Keep only {x}.",
    "I am looking for {x}. Please help me spot it.",
    "Can you see {x} here? Repeat it.",
]
LETTERS = [
    "Write {x} of the word.",
    "What is {x} of this word?",
    "Give {x} of the following word.",
    "Answer with {x} of the input.",
    "Return {x} of the word below.",
    "For the given word, print {x}.",
    "Look at the word and say {x}.",
    "Output {x}.",
]
LETTERS_UNSEEN = [
    "A word is given. I need {x}.",
    "Please tell me {x} of what follows.",
    "Work out {x} for this entry.",
    "Here comes a word: report {x}.",
]
FORMS = [
    "Write {x} of the word.",
    "What is {x} of this word?",
    "Give {x} of the following word.",
    "Change the word to {x}.",
    "Turn this word into {x}.",
    "Return {x}.",
    "Put the word below into {x}.",
    "Answer with {x} of the input.",
]
FORMS_UNSEEN = [
    "I need {x} of what is written here.",
    "How does one write {x} of the next word?",
    "A word follows. Reply using {x}.",
    "Please convert the entry to {x}.",
]
NUMBERS = [
    "Write {x}.",
    "What is {x}?",
    "Give {x}.",
    "Compute {x}.",
    "Answer with {x}.",
    "Return {x} and nothing else.",
    "Find {x}.",
    "Read the input and print {x}.",
]
NUMBERS_UNSEEN = [
    "I would like to have {x}.",
    "Please work out {x} for me.",
    "Can you tell {x}?",
    "Your reply should be {x}.",
]
FACTS = [
    "Write {x} of the country.",
    "What is {x} of this country?",
    "Name {x} of the following country.",
    "Give {x} of the country below.",
    "Answer with {x} of the given country.",
    "A country is given: return {x}.",
    "For the country in the input, write {x}.",
    "Which is {x} of that country?",
]
FACTS_UNSEEN = [
    "I am reading about a place and need {x}.",
    "Please tell me {x} of the nation named here.",
    "Can you fill in {x} for this entry?",
    "A state follows. Reply by stating {x}.",
]
OPPOSITES = [
    "Write the opposite of the word.",
    "What is the antonym of this word?",
    "Give a word that means the opposite.",
    "Answer with the opposite of the input.",
    "Which word is the contrary of the following one?",
    "Return the antonym of the word below.",
]
OPPOSITES_UNSEEN = [
    "Reverse the meaning of this entry.",
    "I need a term with the contrary sense.",
    "Please name the other extreme.",
]

# ---------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Task:
    name: str
    family: str
    pairs: Sequence[tuple[str, str]]
    """Inputs, each once, with their answers."""
    wordings: Sequence[str]
    unseen_wordings: Sequence[str]


def rank(*key: object) -> int:
    """Returns a number that depends on the key alone."""
    return int.from_bytes(sha256(":".join(map(str, key)).encode()).digest()[:8], "big")


def ranked(items: Iterable[T], *key: object) -> list[T]:
    """Returns the items in an order that depends on the key alone."""
    return sorted(items, key=lambda item: rank(*key, item))


def is_tested(text: str) -> bool:
    """Returns whether an input is kept for testing, in every task."""
    return rank("input", text) % 4 == 0


def lists(pools: Sequence[Sequence[str]], size: int, *key: object) -> list[list[str]]:
    """Returns lists without repeated words, each word from a random one of the pools."""
    found = []
    for number in range(LISTS):
        words: list[str] = []
        attempt = 0
        while len(words) < size:
            pool = pools[rank(*key, number, attempt, "pool") % len(pools)]
            word = pool[rank(*key, number, attempt, "word") % len(pool)]
            words += [word] if word not in words else []
            attempt += 1
        found.append(words)
    return found


def place_tasks() -> list[Task]:
    answers: dict[str, tuple[Callable[[list[str]], str], list[str]]] = {
        "first": (lambda words: words[0], ["the first word", "the word that stands first"]),
        "last": (lambda words: words[-1], ["the last word", "the word at the end"]),
        "middle": (
            lambda words: words[len(words) // 2],
            ["the middle word", "the word in the middle"],
        ),
        "alphabetically-first": (
            min,
            ["the word that is first in alphabetical order", "the alphabetically first word"],
        ),
    }
    tasks = []
    for name, (answer, phrases) in answers.items():
        for size in (3, 5):
            drawn = lists(list(KINDS.values()), size, "list", size)
            pairs = [(", ".join(words), answer(words)) for words in drawn]
            wordings = both(PICK_PLACE, PICK_PLACE_UNSEEN, phrases)
            tasks.append(task(f"{name}-of-{size}", "place", pairs, *wordings))
    return tasks


def kind_tasks() -> list[Task]:
    wanted = {
        "animal": (["the animal", "an animal"], (3, 5)),
        "color": (["the color", "a color"], (3, 5)),
        "fruit": (["the fruit", "a fruit"], (5,)),
        "tool": (["the tool", "a tool"], (3,)),
        "verb": (["the verb", "a verb"], (5,)),
        "adjective": (["the adjective", "an adjective"], (5,)),
    }
    tasks = []
    for kind, (phrases, sizes) in wanted.items():
        others = [words for name, words in KINDS.items() if name not in {kind, *NOT_AMONG[kind]}]
        for size in sizes:
            pairs = []
            for number, words in enumerate(lists(others, size - 1, kind, size)):
                target = KINDS[kind][rank(kind, size, number, "target") % len(KINDS[kind])]
                words.insert(rank(kind, size, number, "position") % size, target)
                pairs.append((", ".join(words), target))
            wordings = both(PICK_KIND, PICK_KIND_UNSEEN, phrases)
            tasks.append(task(f"{kind}-among-{size}", "kind", pairs, *wordings))
    return tasks


def letter_tasks() -> list[Task]:
    words = sorted({*ANIMALS, *FRUITS, *TOOLS, *VERBS, *ADJECTIVES, *OBJECTS, *NOUNS})
    answers: dict[str, tuple[Callable[[str], str], list[str]]] = {
        "first-letter": (lambda word: word[0], ["the first letter", "the initial letter"]),
        "first-letter-upper": (
            lambda word: word[0].upper(),
            ["the capital form of the first letter", "the upper-case form of the initial letter"],
        ),
        "last-letter": (lambda word: word[-1], ["the last letter", "the final letter"]),
        "second-letter": (lambda word: word[1], ["the second letter", "letter number two"]),
        "spell-out": (
            " ".join,
            ["the space-separated letters", "the letter-by-letter spelling"],
        ),
    }
    tasks = []
    for name, (answer, phrases) in answers.items():
        wordings = both(LETTERS, LETTERS_UNSEEN, phrases)
        tasks.append(task(name, "letters", [(word, answer(word)) for word in words], *wordings))
    return tasks


def form_tasks() -> list[Task]:
    irregular, plurals = dict(split(PAST)), dict(split(PLURALS))
    verbs = sorted({*irregular, *REGULAR})
    nouns = {*plurals, *NOUNS, *ANIMALS, *OBJECTS, *FRUITS} - TWO_PLURALS
    answers = {
        "plural": (
            [(noun, plurals.get(noun) or with_s(noun)) for noun in sorted(nouns)],
            ["the plural", "the plural form"],
        ),
        "past-tense": (
            [(verb, irregular.get(verb) or with_ed(verb)) for verb in verbs],
            ["the past tense", "the simple past form"],
        ),
        "third-person": (
            [(verb, with_s(verb)) for verb in verbs],
            ["the third person singular", "the form that follows 'she'"],
        ),
        "comparative": (split(COMPARATIVES), ["the comparative", "the comparative form"]),
    }
    return [
        task(name, "inflection", pairs, *both(FORMS, FORMS_UNSEEN, phrases))
        for name, (pairs, phrases) in answers.items()
    ]


def number_tasks() -> list[Task]:
    numbers = ranked(((a, b) for a in range(2, 99) for b in range(2, 99) if a != b), "pair")[:LISTS]
    answers: dict[str, tuple[Callable[[int, int], int], list[str]]] = {
        "sum": (lambda a, b: a + b, ["the sum of the two numbers", "the two numbers added up"]),
        "difference": (
            lambda a, b: abs(a - b),
            ["the difference between the two numbers", "the distance between the two numbers"],
        ),
        "larger-number": (max, ["the larger of the two numbers", "the greater number"]),
    }
    tasks = []
    for name, (answer, phrases) in answers.items():
        pairs = [(f"{a} {b}", str(answer(a, b))) for a, b in numbers]
        tasks.append(task(name, "numbers", pairs, *both(NUMBERS, NUMBERS_UNSEEN, phrases)))
    words = [(str(n), in_words(n)) for n in ranked(range(1, 1000), "words")[:LISTS]]
    phrases = ["the number in words", "the number as English words"]
    tasks.append(task("number-in-words", "numbers", words, *both(NUMBERS, NUMBERS_UNSEEN, phrases)))
    return tasks


def country_tasks() -> list[Task]:
    countries = [entry.split(": ") for entry in " ".join(COUNTRIES.split()).split(", ")]
    columns = {
        "capital": (1, ["the capital", "the capital city"]),
        "language": (2, ["the main language", "the official language"]),
    }
    tasks = []
    for name, (column, phrases) in columns.items():
        pairs = [(one[0], one[column]) for one in countries if len(one) > column]
        tasks.append(task(name, "countries", pairs, *both(FACTS, FACTS_UNSEEN, phrases)))
    return tasks


def opposites() -> Task:
    pairs = split(ANTONYMS)
    both_ways = [*pairs, *((other, one) for one, other in pairs)]
    return task("antonym", "meaning", both_ways, OPPOSITES, OPPOSITES_UNSEEN)


def task(
    name: str,
    family: str,
    pairs: Sequence[tuple[str, str]],
    wordings: Sequence[str],
    unseen_wordings: Sequence[str],
) -> Task:
    """Returns a task with its share of the family's wordings. Raises ValueError for an input with
    two answers."""
    pairs = list(dict.fromkeys(pairs))
    if len(dict(pairs)) < len(pairs):
        raise ValueError(
            f"{name}: an input has two answers, one of {set(pairs) - {*dict(pairs).items()}}"
        )
    known = ranked(wordings, name, "wording")[:TRAIN_WORDINGS]
    unseen = ranked(unseen_wordings, name, "unseen")[:UNSEEN_WORDINGS]
    return Task(name, family, pairs, known, unseen)


def both(
    templates: Sequence[str], unseen: Sequence[str], phrases: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Returns both groups of templates, filled with the phrases in turn."""
    filled = [
        [text.format(x=phrases[i % len(phrases)]) for i, text in enumerate(group)]
        for group in (templates, unseen)
    ]
    return filled[0], filled[1]


def split(entries: Iterable[str]) -> list[tuple[str, str]]:
    """Returns the two words of each `one:other`."""
    return [(one, other) for one, other in (entry.split(":") for entry in entries)]


def with_s(word: str) -> str:
    """Returns the regular plural of a noun, or the third person of a verb."""
    if word.endswith(("s", "x", "z", "ch", "sh")) or word in TAKES_ES:
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


TAKES_ES = {"go", "hero", "potato", "tomato", "echo"}
TWO_PLURALS = {"mosquito", "octopus", "scarf", "mango"}


def with_ed(verb: str) -> str:
    """Returns the past tense of a regular verb whose last consonant is not doubled."""
    if verb.endswith("e"):
        return verb + "d"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ied"
    return verb + "ed"


ONES = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
sixteen seventeen eighteen nineteen
""".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def in_words(number: int) -> str:
    """Returns a number below 1000 in words."""
    if number < 20:
        return ONES[number]
    if number < 100:
        tens = TENS[number // 10 - 2]
        return tens if number % 10 == 0 else f"{tens}-{ONES[number % 10]}"
    hundreds = f"{ONES[number // 100]} hundred"
    return hundreds if number % 100 == 0 else f"{hundreds} and {in_words(number % 100)}"


def all_tasks() -> list[Task]:
    """Returns all tasks, checked. Raises ValueError for words or wordings that contradict what this
    file says of them."""
    tasks = [*place_tasks(), *kind_tasks(), *letter_tasks(), *form_tasks(), *number_tasks()]
    tasks += [*country_tasks(), opposites()]
    listed = [word for words in KINDS.values() for word in words]
    twice = sorted({word for word in listed if listed.count(word) > 1})
    if twice:
        raise ValueError(f"words of two kinds: {', '.join(twice)}")
    known = {wording for one in tasks for wording in one.wordings}
    unseen = {wording for one in tasks for wording in one.unseen_wordings}
    if shared := known & unseen:
        raise ValueError(f"wordings both in training and unseen: {', '.join(sorted(shared))}")
    answers: dict[str, str] = {}
    for one in tasks:
        for wording in (*one.wordings, *one.unseen_wordings):
            for text, answer in one.pairs:
                prompt = f"{wording}\n{text}"
                if answers.setdefault(prompt, answer) != answer:
                    raise ValueError(f"two answers to {prompt!r}: {answer}, {answers[prompt]}")
    return tasks


def rows(one: Task, split_name: str) -> list[dict[str, str]]:
    """Returns the rows of a split: every input once, in one of the split's wordings."""
    wordings = one.unseen_wordings if split_name == "unseen" else one.wordings
    pairs = [pair for pair in one.pairs if is_tested(pair[0]) == (split_name != "train")]
    chosen = ranked(pairs, one.name, "row")[: ROWS[split_name]]
    return [
        {"prompt": f"{wordings[i % len(wordings)]}\n{text}", "response": answer}
        for i, (text, answer) in enumerate(chosen)
    ]


def write_tasks(output: Path) -> list[Task]:
    """Writes the files of all tasks, and returns the tasks."""
    tasks = all_tasks()
    for one in tasks:
        (output / one.name).mkdir(parents=True, exist_ok=True)
        for split_name in ROWS:
            lines = "".join(json.dumps(row) + "\n" for row in rows(one, split_name))
            file = output / one.name / f"{one.name}_{split_name}_formatted.jsonl"
            file.write_text(lines, encoding="utf-8", newline="\n")
    families = {one.name: {"family": one.family} for one in tasks}
    text = json.dumps(families, indent=1, sort_keys=True) + "\n"
    (output / "tasks.json").write_text(text, encoding="utf-8", newline="\n")
    return tasks


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the tasks of examples/real-tasks.")
    parser.add_argument("--output", type=Path, required=True, help="the directory to write")
    output = parser.parse_args().output
    tasks = write_tasks(output)
    print(f"{len(tasks)} tasks in {len({one.family for one in tasks})} families: {output}")


if __name__ == "__main__":
    main()
