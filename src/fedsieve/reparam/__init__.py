"""What a network computes with, as a function of what is learned: sign masks, random masks, masks by threshold, powers."""
