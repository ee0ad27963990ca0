// A state that holds blocks, for ever if it must be.
// error: law 3: a state that holds blocks needs a deadline
#include "loan.hpp"
namespace loan {
struct Lingering {
  static constexpr std::string_view name = "Kept";
#ifdef MUST_NOT_COMPILE
  static constexpr StateFacts facts{.blocks = Party::owner};
#else
  static constexpr StateFacts facts = Kept::facts;
#endif
};
static_assert(lawful<Loan<rows, Read, Tick, Lingering>>());
}  // namespace loan
