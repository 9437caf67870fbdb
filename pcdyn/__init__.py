from pcdyn.network import Dense, Network, mlp
from pcdyn.energy import Gaussian
from pcdyn.problem import InferenceProblem
