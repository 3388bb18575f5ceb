"""Files to tensors and back: knows safetensors, nothing of transformers.

A checkpoint is a folder. ``open.open_checkpoint`` turns one into a ``source.TensorSource``, from which tensors
are read one at a time; ``rewrite.rewrite`` streams a source into a new folder. Import from the modules: this
package imports nothing, so that reading an index (``index.read_index``) does not load torch.
"""
