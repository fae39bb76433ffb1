"""`python -m cnnft` works from a checkout that is not installed."""

from cnnft.cli import main

if __name__ == "__main__":
    main()
