"""``python -m spiking_lm``: the command line, as torchrun starts it."""

from spiking_lm.cli import main

if __name__ == "__main__":
    main()
