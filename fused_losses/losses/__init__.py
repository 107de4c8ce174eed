"""The losses, one family a file or folder: modules, functions, autograd."""
