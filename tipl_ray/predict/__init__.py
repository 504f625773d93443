"""What every predictor is asked, the predictors that policies are compared by, and what a representation is."""
