"""What a run folder, perhaps from somebody else, must be before anything of it is used."""
