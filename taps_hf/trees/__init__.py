"""Draft trees: what they are, how they grow, and how several become one."""
