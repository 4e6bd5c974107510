"""`python -m regraft` is the command line too."""

from regraft.cli import main

if __name__ == "__main__":
    main()
