"""GLUE (arXiv 1804.07461): its tasks, its files, its metrics, and the settings of the HRA paper."""
