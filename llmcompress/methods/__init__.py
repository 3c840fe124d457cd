"""Methods decide what is put on a grid: one file each, named by the word the user types. None knows a byte layout."""

METHODS = ("nearest", "gptq")
PRUNING = ("magnitude", "wanda", "sparsegpt")  # what goes
FIRST_RUNG = "damping 0.01"  # what GPTQ does to H if it is sound
