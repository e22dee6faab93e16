def test_a(collection, experiment):
    import os
    for r in [*collection.runs.values(), experiment]:
        for p in sorted(r.rglob("*")): print(p.relative_to(r), p.stat().st_size)
    print((experiment/"manifest.json").read_text())
    assert 0
