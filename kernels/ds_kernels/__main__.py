"""`python -m ds_kernels`: build the kernels of this host ahead of time and say what is used."""

from ds_kernels.library import choose

if __name__ == "__main__":
    print(choose())
