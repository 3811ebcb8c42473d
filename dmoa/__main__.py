"""`python -m dmoa`: the command line where the console script is not on the path."""

from dmoa.cli.main import main

if __name__ == "__main__":
    main()
