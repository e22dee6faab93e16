"""`python -m loragen` is the `loragen` command."""

from loragen.cli.main import main

if __name__ == "__main__":
    main()
