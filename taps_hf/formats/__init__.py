"""Drafters in the formats of others: reading what they trained, writing what engines serve."""
