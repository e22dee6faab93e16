from loragen.legacy.discover import find_runs


def one_of(path):
    (run,) = find_runs(path)
    return run
