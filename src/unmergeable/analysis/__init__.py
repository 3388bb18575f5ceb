"""What weights look like from outside: connectivity, sensitivity, sharpness, distances, planes of weights."""
