"""Training: the loop, its optimisers and the augmentation that runs on whole batches."""
