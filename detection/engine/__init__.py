"""The training loop and what it stands on. It knows no detection: the classifier trains with it too."""
