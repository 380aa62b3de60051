"""`python -m rai_toolbox` is the command `rai-toolbox`."""

from rai_toolbox.cli import run

if __name__ == "__main__":
    run()
