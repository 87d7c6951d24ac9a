"""`python -m onnxcomp` is the command `onnxcomp`."""

from onnxcomp.cli import main

if __name__ == "__main__":
    main()
