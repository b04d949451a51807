"""Example prompts: mathematics, conversation, and a mixture of both."""

EXAMPLES = {
    "Maths: the orchard": "An orchard has 18 rows of 24 apple trees. A storm fells 37 trees, and "
    "half of the rest are picked on Monday. How many trees are left to pick?",
    "Maths: two pumps": "One pump fills a pool in 6 hours, another in 3 hours. How long do they "
    "take together? Explain step by step.",
    "Conversation: a new town": "I have just moved to a new town and know nobody here. How can I "
    "meet people without going to bars?",
    "Conversation: thank-you note": "Write a short, warm thank-you note to my grandmother, who "
    "knitted me a blue scarf.",
    "Mixture: a school trip": "I am planning a school trip for 28 children. The bus costs 210 "
    "euros and the museum 4 euros a child. What does each child have to pay? Then write a friendly "
    "message to the parents that explains the price.",
}
