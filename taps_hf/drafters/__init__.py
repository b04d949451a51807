"""What proposes: the protocol of a drafter, and the kinds there are."""
