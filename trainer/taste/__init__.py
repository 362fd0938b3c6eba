"""A person's own taste: choices between images, and what is made of them."""
