"""What the recipes for language models share: rows of conversations, templates, tokens with their labels, packing, answers."""
