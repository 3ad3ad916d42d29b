"""Scripts that are run by hand, or that wrote what lies in configs/."""
