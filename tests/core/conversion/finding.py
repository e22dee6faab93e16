from loragen.core.conversion.discover import find_runs


def one_of(path):
    (run,) = find_runs(path)
    return run
