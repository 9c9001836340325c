"""`python -I -m cloister.enclave`, with one boot line on standard input."""

from cloister.enclave.main import main

if __name__ == "__main__":
    main()
