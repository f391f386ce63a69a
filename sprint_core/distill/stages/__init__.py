"""What each stage of training learns, and from what loss."""
