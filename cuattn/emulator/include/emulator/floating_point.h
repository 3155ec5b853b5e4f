// The host's floating-point environment.
#pragma once

#include <cfenv>

namespace emulator {

// The environment that IEEE operations need: the caller's may flush subnormals or round otherwise.
class DefaultFloatingPoint {
  public:
    DefaultFloatingPoint() {
        std::fegetenv(&before_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultFloatingPoint() { std::fesetenv(&before_); }

  private:
    std::fenv_t before_;
};

}  // namespace emulator
