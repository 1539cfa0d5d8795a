"""What the recipes share: configuration, run folder, trainer, dry run, sweep."""
