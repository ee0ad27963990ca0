// A state that nothing leads to.
// error: law 5: a state is not reachable
#include "loan.hpp"
namespace loan {
inline constexpr std::array alive{
    fsm::to<Idle, Keep, Kept>(), fsm::to<Kept, Open, Read>(), fsm::to<Kept, Take, Over>(),
    fsm::to<Read, Done, Over>(), fsm::to<Read, Cut, Over>(),
};
#ifdef MUST_NOT_COMPILE
static_assert(lawful<Loan<alive>>());
#else
static_assert(lawful<Loan<rows>>());
#endif
}  // namespace loan
