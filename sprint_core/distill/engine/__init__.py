"""The training loop and what it runs on; it knows no loss and no dataset."""
