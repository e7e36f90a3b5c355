def calibrated_plan(p,d): raise NotImplementedError
