"""Networks for classification and detection; they know torch alone."""
