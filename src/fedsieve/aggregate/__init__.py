"""What a server does with the replies of a round: means, votes, server optimisers."""
