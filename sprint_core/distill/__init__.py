"""Making a SANA-Sprint: the TrigFlow transform, sCM and LADD (arXiv 2503.09641, section 3)."""
