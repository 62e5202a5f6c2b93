"""Put on PYTHONPATH by the tests of the launcher: its workers then run the stand-ins beside this file."""

import sys

import stub_evaluation
import stub_training

sys.modules["titans_dist.training"] = stub_training
sys.modules["titans_dist.evaluation"] = stub_evaluation
