"""Several processes that train one network: how they meet, and what they tell each other."""
