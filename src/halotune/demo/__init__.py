"""`halotune demo`: a real pretrained encoder, real human ratings, every method in turn, one page of results."""
