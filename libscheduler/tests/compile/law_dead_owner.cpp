// Nothing ends what a dead owner held.
// error: law 6: a death does not end what the dead one held
#include "loan.hpp"
namespace loan {
inline constexpr std::array immortal{
    fsm::to<Idle, Keep, Kept>(), fsm::to<Kept, Open, Read>(), fsm::to<Kept, Take, Over>(),
    fsm::to<Read, Done, Over>(), fsm::to<Read, Cut, Over>(),  fsm::to<Read, Die, Dead>(),
};
#ifdef MUST_NOT_COMPILE
static_assert(lawful<Loan<immortal>>());
#else
static_assert(lawful<Loan<rows>>());
#endif
}  // namespace loan
