"""Any published file to a network, and back."""
