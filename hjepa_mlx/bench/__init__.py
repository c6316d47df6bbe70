"""Time a recipe on this machine, and estimate the hours of every data set from that."""
