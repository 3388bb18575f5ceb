"""The story on a real model: train two experts, merge them, protect one, watch the merge fail, attack, restore."""
