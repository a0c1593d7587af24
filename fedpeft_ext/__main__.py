"""`python -m fedpeft_ext` is `fedpeft`."""

from fedpeft_ext.cli import main

if __name__ == "__main__":
    main()
