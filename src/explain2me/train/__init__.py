"""Training: ``study`` runs many, ``training`` is one with its folder, ``loop`` its epochs, ``losses`` what it minimises."""
