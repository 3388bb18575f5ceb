"""Feed-forwards as polynomials: the mathematics, the networks that hold them, and the files these are written to."""
