"""``python -m lightning_sea`` is the console script ``lightning-sea``."""

from .cli import main

if __name__ == "__main__":
    main()
