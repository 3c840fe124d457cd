"""Methods decide what is put on a grid: one file each, named by the word the user types. None knows a byte layout."""

METHODS = ("nearest", "gptq")
