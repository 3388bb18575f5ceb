"""The symmetry map of a network that nobody declared, found by experiment on a small random copy and proven on it.

shrink    a config of the same kind with small sizes
build     a random float64 network of that config, and inputs for it
watch     one forward pass: every product with a weight, every attention
probe     which coordinate of which projection each query, key, value and hidden unit comes from
propose   blocks in the words of :mod:`unmergeable.architecture.blocks`
prove     the function is unchanged by random elements of a group, and changed by what is outside it
table     what was proven, for every size of the same kind of network, as readable JSON
"""
