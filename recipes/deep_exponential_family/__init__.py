"""Deep exponential families for text: topics, topics of topics, and what they say of unseen words."""
